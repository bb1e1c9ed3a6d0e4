"""Parts of MOS: each module holds the verbs of one concern, as a class that MOS inherits."""
