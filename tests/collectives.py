"""Bytes that each device sends in a compiled program, read from the compiler's text."""

import collections
import math
import re

_SHAPE = re.compile(r"(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_TIMES = {  # what a device sends in a ring of n, of a result of one byte
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
}


def sent_bytes(text: str) -> float:
    """Of a program as `compiled.as_text()` gives it; loops count as often as they run."""
    bodies, entry, name = collections.defaultdict(list), None, None
    for line in text.splitlines():
        if begun := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = begun[2]
            entry = name if begun[1] else entry
        elif name and line.startswith("  "):
            bodies[name].append(line)

    def total(name):
        return sum(_sent_in(line) for line in bodies[name]) + sum(
            times * total(callee) for line in bodies[name] for times, callee in _called(line)
        )

    return total(entry)


def _sent_in(line):
    if found := re.search(r"= (.*?) collective-permute\(", line):
        return _bytes(found[1])
    if found := re.search(rf"= (.*?) ({'|'.join(_TIMES)})\(", line):
        return _bytes(found[1]) * _TIMES[found[2]](_group_size(line))
    assert not re.search(rf" ({'|'.join(_TIMES)}|collective-permute)[\w-]*\(", line), line
    return 0


def _called(line):
    """(how often, name) of each computation that a line runs."""
    if " while(" in line:
        (times,) = re.findall(r'known_trip_count[^}]*?"n":"(\d+)"', line)
        yield int(times), re.search(r"body=%?([\w.\-]+)", line)[1]
    elif not re.search(r" (all-reduce|reduce|reduce-scatter|reduce-window|scatter|sort|select-and-scatter|map)\(", line):
        for names in re.findall(r"(?:to_apply|calls|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)", line):
            yield from ((1, name.strip().lstrip("%")) for name in names.split(","))


def _bytes(shapes):
    sizes = {"pred": 8, "bf16": 16}
    return sum(
        math.prod(int(dim) for dim in dims.split(",") if dim) * (sizes.get(dtype) or int(dtype[1:])) // 8
        for dtype, dims in _SHAPE.findall(shapes)
    )


def _group_size(line):
    """Of the three ways in which groups of devices are written."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", line)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
