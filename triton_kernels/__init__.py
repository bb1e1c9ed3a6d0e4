"""Triton kernels of memos, installed as ``memos.triton_kernels``.

In a source tree this folder can be found under the name of OpenAI's package ``triton_kernels``,
which inference engines look for. Refusing that name makes them go on to their own copy.
"""

if __name__ == "triton_kernels":
    raise ImportError("this folder is memos.triton_kernels, not OpenAI's triton_kernels")
