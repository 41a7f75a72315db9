"""Which instructions programs can use on this CPU: an image restores only where there are all that it was made with.

Owns the reading of /proc/cpuinfo. Only names of what a program can execute count: the kernel's own notes (mitigations,
clocks) come and go with its version, and runsc compares what the processor itself says.
"""

import re
from functools import cache
from pathlib import Path

_USABLE = re.compile(
    r"abm|adx|aes|amx_\w+|avx\w*|bmi[12]|cldemote|clwb|cmov|cx8|cx16|erms|f16c|fma4?|fpu|fsgsbase|fxsr|fxsr_opt|gfni|"
    r"hle|lahf_lm|lm|misalignsse|mmx|mmxext|movbe|movdir64b|movdiri|mpx|ospke|pclmulqdq|pku|pni|popcnt|rdpid|rdrand|"
    r"rdseed|rdtscp|rtm|sha_ni|sse\w*|ssse3|syscall|tbm|umip|vaes|vpclmulqdq|waitpkg|xgetbv1|xop|xsave(opt|c|s)?|3dnow\w*"
)
_LINE = re.compile(r"^(flags|Features)\s*:(.*)$", re.MULTILINE)


@cache
def cpu_features() -> str:
    """Names in alphabetical order, with spaces between; empty where the kernel does not tell."""
    return features_in(Path("/proc/cpuinfo").read_text())


def features_in(cpuinfo: str) -> str:
    """What all processors of a /proc/cpuinfo have. On other machines than x86 every name counts."""
    lines = [(found[1], set(found[2].split())) for found in _LINE.finditer(cpuinfo)]
    if not lines:
        return ""
    common = set[str].intersection(*(names for _, names in lines))
    if lines[0][0] == "flags":
        common = {name for name in common if _USABLE.fullmatch(name)}
    return " ".join(sorted(common))
