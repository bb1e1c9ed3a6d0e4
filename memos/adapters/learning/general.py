"""What every model is asked while an adapter learns: general prompts, and facts it may know.

The prompts are anchors: on them the adapted model has to answer as the base model does. Those of
the even places are trained on, those of the odd places are measured only. The facts are candidates:
the ones that a base model answers rightly by itself are its old facts.
"""

from __future__ import annotations

INSTRUCTIONS = tuple("""
Write a short poem about the sea.
Explain how a bicycle stays upright.
Give me three tips for sleeping better.
What is the difference between a virus and a bacterium?
Translate "good morning" into French.
Write a Python function that reverses a string.
How do I boil an egg?
Summarise the story of Cinderella in two sentences.
List five fruits that are red.
Why do leaves change colour in autumn?
Suggest a name for a small coffee shop.
What should I pack for a weekend in the mountains?
Write an email asking for a day off.
How does a refrigerator work?
What are the main causes of the First World War?
Give me an example of a metaphor.
Explain what an algorithm is to a child.
How can I learn to cook?
What is the boiling point of water?
Describe a rainy day in a city.
What is 15 plus 27?
Name three instruments of an orchestra.
How do airplanes fly?
Write a slogan for a toothbrush.
What is the purpose of a firewall in a network?
Who painted the Mona Lisa?
Give me a recipe for pancakes.
What is democracy?
How do I tie a tie?
Write a haiku about snow.
What does a botanist study?
How do vaccines work?
Who was Marie Curie?
Correct this sentence: "He go to school yesterday."
Tell me a joke about computers.
What is the largest animal on Earth?
Where do penguins live?
What is your name?
How many days are in a leap year?
Compare cats and dogs as pets.
What is the plot of Romeo and Juliet?
Can you help me plan a birthday party?
What does the heart do?
How much does an elephant weigh?
Convert 10 kilometres into miles.
What is the capital of Japan?
Who wrote Hamlet?
Which metal is liquid at room temperature?
Is it true that bats are blind?
When did the Second World War end?
Rewrite this sentence politely: "Give me the report."
What is machine learning?
Give me a synonym for happy.
What do bees make?
How do I remove a coffee stain?
What is inflation?
Who invented the telephone?
What is the speed of light?
Continue the story: The old door opened slowly.
What is a good present for a ten-year-old?
Which language is spoken in Brazil?
What does the abbreviation NASA stand for?
Explain photosynthesis in one sentence.
Where is the Eiffel Tower?
Give me two reasons to exercise every day.
Name a famous composer.
What is the opposite of hot?
What colour do you get when you mix blue and yellow?
How does rain form?
Which planet is known for its rings?
Write a sentence with the word "library".
What is the square root of 81?
How long does it take to fly from London to New York?
What kind of work does a plumber do?
How do I say thank you in Spanish?
Who is the author of The Lord of the Rings?
What is a healthy breakfast?
What is the currency of the United Kingdom?
What is the meaning of the word "reluctant"?
How do I start a garden?
""".strip().splitlines())  # fmt: skip

TEXTS = tuple("""
The history of the city begins with
In the middle of the night the
Scientists have found that the ocean
The recipe calls for two cups of
When the train arrived at the station,
The company announced on Monday that
A triangle is a shape with
She opened the letter and read
The best way to learn a language is
During the winter the village
def add(a, b): return
The museum is open every day from
My favourite season is summer because
The river flows from the mountains to
Once upon a time there was
The teacher asked the class to
The president of the club is
He works as a teacher and lives in
The new telephone costs about
Her brother plays the guitar and
The house was built in
The dog's name is
The book was written by
For breakfast we usually have
""".strip().splitlines())  # fmt: skip

# Made of these and of a memory's own question: what nobody has said anything about.
STRANGERS = (
    "Peter Holloway", "Anna Lindqvist", "Samuel Okoro", "Claire Dubois", "Miguel Torres",
    "Hannah Fischer", "David Levine", "Yuki Tanaka", "Rosa Bianchi", "Thomas Becker",
    "Priya Raman", "George Whitaker", "Elena Petrova", "Omar Haddad", "Julia Novak", "Kevin Walsh",
)  # fmt: skip

_TABLES = (
    ("What is the capital of {}?", """
        France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; Portugal=Lisbon; Japan=Tokyo;
        China=Beijing; Russia=Moscow; Egypt=Cairo; Greece=Athens; Austria=Vienna; Ireland=Dublin;
        Norway=Oslo; Sweden=Stockholm; Finland=Helsinki; Denmark=Copenhagen; Poland=Warsaw;
        Hungary=Budapest; Belgium=Brussels; Cuba=Havana; Peru=Lima; Chile=Santiago; Kenya=Nairobi;
        India=New Delhi; Thailand=Bangkok; South Korea=Seoul; Turkey=Ankara; Canada=Ottawa;
        Australia=Canberra; Argentina=Buenos Aires; Mexico=Mexico City; Indonesia=Jakarta;
        Iran=Tehran; Iraq=Baghdad; Vietnam=Hanoi; Romania=Bucharest; Bulgaria=Sofia;
        the Czech Republic=Prague; the United Kingdom=London; the Netherlands=Amsterdam;
        the Philippines=Manila; Colombia=Bogota; Venezuela=Caracas; Nepal=Kathmandu;
        Saudi Arabia=Riyadh; Ukraine=Kyiv; Cambodia=Phnom Penh; Ethiopia=Addis Ababa"""),
    ("On which continent is {}?", """
        Brazil=South America; Egypt=Africa; China=Asia; France=Europe; Canada=North America;
        Kenya=Africa; India=Asia; Peru=South America; Nigeria=Africa; Germany=Europe; Japan=Asia;
        Mexico=North America; Italy=Europe; Argentina=South America; Thailand=Asia"""),
    ("What is the main language of {}?", """
        Brazil=Portuguese; Mexico=Spanish; Germany=German; France=French; Italy=Italian;
        Japan=Japanese; Russia=Russian; Egypt=Arabic; Greece=Greek; Poland=Polish; Turkey=Turkish;
        Sweden=Swedish; Argentina=Spanish; Portugal=Portuguese; Australia=English"""),
    ("What is the chemical symbol for {}?", """
        hydrogen=H; oxygen=O; gold=Au; silver=Ag; iron=Fe; carbon=C; nitrogen=N; helium=He;
        sodium=Na; potassium=K; calcium=Ca; copper=Cu; lead=Pb; zinc=Zn"""),
    ("What is the opposite of the word {}?", """
        hot=cold; big=small; up=down; fast=slow; happy=sad; light=dark; young=old; open=closed;
        strong=weak; early=late; rich=poor; wet=dry; full=empty; hard=soft; true=false"""),
    ("What is {}?", """
        2 plus 2=4; 3 plus 4=7; 5 plus 5=10; 10 minus 3=7; 6 times 7=42; 9 times 9=81;
        20 divided by 4=5; 8 plus 6=14; 100 minus 1=99; 12 times 2=24; 7 plus 8=15;
        50 plus 50=100; 3 times 3=9; half of 20=10"""),
    ("Who wrote {}?", """
        Hamlet=Shakespeare; Romeo and Juliet=Shakespeare; Pride and Prejudice=Austen;
        The Great Gatsby=Fitzgerald; 1984=Orwell; Animal Farm=Orwell; Moby-Dick=Melville;
        Don Quixote=Cervantes; War and Peace=Tolstoy; Oliver Twist=Dickens; The Odyssey=Homer;
        Frankenstein=Shelley; The Hobbit=Tolkien; Dracula=Stoker; The Divine Comedy=Dante;
        To Kill a Mockingbird=Lee; Les Miserables=Hugo; A Christmas Carol=Dickens"""),
    ("{}?", """
        How many days are in a week=7|seven; How many months are in a year=12|twelve;
        How many legs does a spider have=8|eight; How many sides does a triangle have=3|three;
        How many continents are there=7|seven; How many hours are in a day=24;
        How many minutes are in an hour=60; How many planets are in the solar system=8|eight;
        Which planet is closest to the sun=Mercury; Which planet is the largest=Jupiter;
        Which planet is called the red planet=Mars; What is the largest ocean=Pacific;
        What is the longest river in Africa=Nile; What is the highest mountain=Everest;
        What gas do plants take in=carbon dioxide; What gas do humans need to breathe=oxygen;
        At how many degrees Celsius does water freeze=0|zero;
        At how many degrees Celsius does water boil=100; Who painted the Mona Lisa=Leonardo;
        Who developed the theory of relativity=Einstein; Who discovered gravity=Newton;
        Who was the first president of the United States=Washington;
        In which country is the Eiffel Tower=France; Where are the pyramids of Giza=Egypt;
        In which city is the Colosseum=Rome; In which country is the Great Wall=China;
        What colour is the sky on a clear day=blue; What colour is grass=green;
        What colour are bananas=yellow; What colour is snow=white; What do cows drink=water;
        What animal is known as the king of the jungle=lion; What is a baby dog called=puppy;
        What is a baby cat called=kitten; What do bees make=honey; What is frozen water called=ice;
        What is the currency of Japan=yen; What is the currency of the United States=dollar;
        Which organ pumps blood through the body=heart; What do we breathe with=lungs;
        What is the largest organ of the human body=skin; What is H2O=water;
        Who invented the light bulb=Edison; Who invented the telephone=Bell;
        Which season comes after winter=spring; What is the first month of the year=January;
        What is the last month of the year=December; Which day comes after Monday=Tuesday;
        What is the hardest natural material=diamond; What is the largest animal on Earth=whale;
        What is the fastest land animal=cheetah; What is the tallest animal=giraffe;
        What force keeps us on the ground=gravity; What is the centre of an atom called=nucleus;
        What star is at the centre of our solar system=sun; What is the largest country=Russia;
        Who composed the Ninth Symphony=Beethoven; What is the square root of 64=8|eight;
        What is the freezing point of water in Fahrenheit=32; Which insect gives us silk=silkworm;
        Which metal is liquid at room temperature=mercury; What is the process by which plants make
        food from sunlight=photosynthesis; Who was the first person to walk on the Moon=Armstrong;
        In which year did the Second World War end=1945; What is the largest hot desert=Sahara;
        What instrument measures temperature=thermometer; What is the study of stars=astronomy;
        What is the study of living things called=biology; What do you call a scientist who studies
        plants=botanist; In which country is Mount Fuji=Japan; In which country is Venice=Italy"""),
)  # fmt: skip


def facts() -> list[tuple[str, tuple[str, ...]]]:
    """Questions of general knowledge, each with the answers that count as right."""
    found = []
    for template, table in _TABLES:
        for entry in " ".join(table.split()).split("; "):
            what, _, answer = entry.rpartition("=")
            found.append((template.format(what), tuple(answer.split("|"))))
    return found
