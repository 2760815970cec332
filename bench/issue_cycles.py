"""An estimate of the time that a program takes from its machine code: what no GPU has confirmed, but can be counted.

A program is charged the costliest path through its basic blocks that does exactly the tensor-core work of its tile.
Loops are found from back edges; how often each runs follows from the tile's sizes and the sequence's length, and is
stated by the caller. A path whose tensor products do not add up to those of the tile is no path: where a compiler
peels or duplicates a loop in a way that this walk does not understand, it finds none and says so, rather than a wrong
number.

Each instruction on the path is then charged to the units of the multiprocessor that it keeps busy, and the program's
cycles are those of the busiest unit (`RATES`): latencies are taken to be hidden by other programs, and nothing is said
of caches or of memory bandwidth. It compares kernels of similar occupancy for the same chip; it predicts no seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from bench.machine_code import Block, Code, Instruction, access_bytes


@dataclass(frozen=True)
class Rates:
    """What one multiprocessor does in a clock cycle.

    Attributes:
        issue: warp instructions issued.
        fp32: lanes of fp32 multiply and add (and integer multiply-add).
        alu: lanes of compare, select, convert, logic and integer add.
        exp: lanes of exp2, log2, reciprocal.
        shared_bytes: bytes between registers, or tensor cores, and shared memory or the first-level cache.
        tensor: fp16/bf16 multiply-adds of the tensor cores with fp32 sums.
    """

    issue: float
    fp32: float
    alu: float
    exp: float
    shared_bytes: float
    tensor: float


# NVIDIA: CUDA C++ programming guide, "throughput of native arithmetic instructions" and shared memory's 32 banks of 4
# bytes; tensor cores: data-sheet peak (dense) / multiprocessors / boost clock / 2, A100 312 TFLOP/s, 108, 1.41 GHz;
# H100 989 TFLOP/s, 132, 1.83 GHz; B200 2250 TFLOP/s, 148, 1.85 GHz; RTX PRO 6000 504 TFLOP/s, 188, 2.62 GHz.
# AMD CDNA 3 white paper: 4 SIMDs that each take 4 cycles for a wave of 64, MI300X 1307 TFLOP/s, 304 units, 2.1 GHz.
RATES = {
    "sm_80": Rates(issue=4, fp32=64, alu=64, exp=16, shared_bytes=128, tensor=1024),
    "sm_90": Rates(issue=4, fp32=128, alu=64, exp=16, shared_bytes=128, tensor=2048),
    "sm_100": Rates(issue=4, fp32=128, alu=64, exp=16, shared_bytes=128, tensor=4096),
    "sm_120": Rates(issue=4, fp32=128, alu=64, exp=16, shared_bytes=128, tensor=512),
    "gfx942": Rates(issue=1, fp32=64, alu=64, exp=16, shared_bytes=128, tensor=1024),
}

_NOT_ALU = re.compile(r"IMAD|I?MOV|CS2R|S2U?R|R2UR|U?LDCU?|U[A-Z]|NOP|v_mov|s_|v_accvgpr")
"""Instructions of the kind "integer" that other units take: multiply-adds, moves, constants, the uniform data path."""

_MMA_SHAPE = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


def products(instruction: Instruction) -> int:
    """Multiply-adds that one warp's tensor instruction stands for; 0 where its name does not tell (UTCHMMA)."""
    if instruction.kind != "tensor":
        return 0
    if shape := re.search(r"(\d+)x(\d+)x(\d+)", instruction.opcode):
        m, n, k = map(int, shape.groups())
        return m * n * k // (4 if instruction.opcode.startswith("HGMMA") else 1)  # four warps share an HGMMA
    return next((macs for name, macs in _MMA_SHAPE.items() if f".{name}." in instruction.opcode), 0)


def _shared_bytes(instruction: Instruction, warp_size: int) -> float:
    """Bytes that a warp's instruction moves through shared memory or the first-level cache."""
    opcode, kind = instruction.opcode, instruction.kind
    if opcode.startswith(("LDSM", "STSM")):
        return 128 * int(re.search(r"88\.?(\d)?", opcode).group(1) or 1)  # matrices of 8 rows of 16 bytes
    if opcode.startswith("HGMMA"):
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", opcode).groups())
        a_is_shared = re.match(r"R\d+, gdesc", instruction.operands) is not None
        return 2 * k * (n + m * a_is_shared) / 4
    if kind == "shuffle":
        return 4 * warp_size
    if kind in ("shared load", "shared store", "global load", "global store", "global to shared"):
        return access_bytes(opcode) * warp_size
    return 0


@lru_cache(maxsize=65536)
def _charge(instruction: Instruction, target: str, warp_size: int) -> dict[str, float]:
    """Cycles of each of a multiprocessor's units that one warp's instruction takes."""
    rates, kind = RATES[target], instruction.kind
    cycles = {"issue": 1 / rates.issue}
    if kind == "fp32" or instruction.opcode.startswith("IMAD"):
        cycles["fp32"] = warp_size / rates.fp32
    elif kind in ("fp32 compare", "convert") or (kind == "integer" and not _NOT_ALU.match(instruction.opcode)):
        cycles["alu"] = warp_size / rates.alu
    elif kind == "exp":
        cycles["exp"] = warp_size / rates.exp
    if bytes_moved := _shared_bytes(instruction, warp_size):
        cycles["staged" if kind == "global to shared" else "shared"] = bytes_moved / rates.shared_bytes
    if macs := products(instruction):
        cycles["tensor"] = macs / rates.tensor
        cycles["macs"] = macs
    return cycles


class Work(Counter):
    """Cycles per unit, "macs" beside them; adds and multiplies."""

    def plus(self, other: Work) -> Work:
        total = Work(self)
        for unit, cycles in other.items():
            total[unit] += cycles
        return total

    def times(self, n: int) -> Work:
        return Work({unit: n * cycles for unit, cycles in self.items()})


Paths = dict[int, Work]
"""Costliest way of doing each amount of tensor work, in multiply-adds of a warp."""


def _keep_costliest(paths: Paths, work: Work) -> None:
    macs = round(work["macs"])
    if macs not in paths or paths[macs]["issue"] < work["issue"]:
        paths[macs] = work


def _then(first: Paths, second: Paths) -> Paths:
    joined: Paths = {}
    for a in first.values():
        for b in second.values():
            _keep_costliest(joined, a.plus(b))
    return joined


@dataclass
class Loop:
    """A natural loop: the blocks that can reach its back edges without leaving through its header."""

    header: int
    latches: set[int]
    blocks: set[int]


def loops_of(blocks: Sequence[Block]) -> list[Loop]:
    """Natural loops of the code that is reachable, in the order of their headers' addresses."""
    order = _reverse_postorder(blocks)
    dominators = {n: set(order) for n in order}
    dominators[0] = {0}
    predecessors = {n: [p for p in order if n in blocks[p].successors] for n in order}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = {n} | set.intersection(*(dominators[p] for p in predecessors[n]))
            changed, dominators[n] = changed or new != dominators[n], new
    loops: dict[int, Loop] = {}
    for latch in order:
        for header in blocks[latch].successors:
            if header in dominators[latch]:
                loop = loops.setdefault(header, Loop(header, set(), {header}))
                loop.latches.add(latch)
                pending = [latch]
                while pending:
                    n = pending.pop()
                    if n not in loop.blocks:
                        loop.blocks.add(n)
                        pending.extend(predecessors[n])
    return [loops[h] for h in sorted(loops)]


def _reverse_postorder(blocks: Sequence[Block]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(blocks[0].successors))]
    while stack:
        n, successors = stack[-1]
        following = next((s for s in successors if s not in seen), None)
        if following is None:
            order.append(n)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return order[::-1]


class _Walk:
    """Costliest paths through a program whose tensor loops, in the order of their headers, run as often as stated."""

    def __init__(self, code: Code, iterations: Sequence[int]):
        self.blocks = code.blocks
        self.loops = loops_of(code.blocks)
        target = code.target
        self.cost = []
        for block in code.blocks:
            work = Work()
            for instruction in block.instructions:
                for unit, cycles in _charge(instruction, target.name, target.warp_size).items():
                    work[unit] += cycles
            self.cost.append(work)
        tensor_loops = [loop for loop in self.loops if self._has_tensor(loop)]
        nested = any(a is not b and a.header in b.blocks for a in tensor_loops for b in tensor_loops)
        if nested or len(tensor_loops) != len(iterations):
            found = ", ".join(f"block {loop.header}" for loop in tensor_loops)
            raise NotImplementedError(
                f"{code.kernel} for {target.name}: {len(iterations)} loops over tensor products were stated, the "
                f"machine code has {len(tensor_loops)}{' nested' if nested else ''} ({found})"
            )
        self.name, self.num_warps = f"{code.kernel} for {target.name}", code.num_warps
        self.loop_at = {loop.header: loop for loop in self.loops}
        self.iterations = {loop.header: n for loop, n in zip(tensor_loops, iterations, strict=True)}

    def _has_tensor(self, loop: Loop) -> bool:
        return any(i.kind == "tensor" for n in loop.blocks for i in self.blocks[n].instructions)

    def replication(self, macs: int) -> float:
        """How often the warps do the tile's products: more than once where there are more warps than slices of it.

        Told by the bodies of the loops, or by the whole program where there are none.
        """
        stated = sum(self.iterations.values())
        if macs == 0:
            return 1
        if not stated:
            return max(self.program()) * self.num_warps / macs
        bodies = [body for header in self.iterations if (body := self._body(self.loop_at[header]))]
        factor = max(max(body) for body in bodies) * self.num_warps / (macs / stated)
        if factor not in {(a + b) / 2 for a in (1, 2, 4) for b in (1, 2, 4)}:  # of a block's two products
            raise NotImplementedError(f"{self.name}: a loop does {factor} times the products stated of it")
        return factor

    def program(self) -> Paths:
        """From the first block to any end."""
        everywhere = set(range(len(self.blocks)))
        reached = self._reach(everywhere, 0, None)
        ends: Paths = {}
        for n, paths in reached.items():
            if self.blocks[n].may_end:
                for work in paths.values():
                    _keep_costliest(ends, work)
        return ends

    def _reach(self, region: set[int], entry: int, inside: Loop | None) -> dict[int, Paths]:
        """Paths from `entry` to the end of every block of a region, inner loops taken as one step each."""
        inner = [
            loop
            for loop in self.loops
            if loop is not inside and loop.blocks <= region and (inside is None or loop.header != inside.header)
        ]
        outermost = {
            loop.header: loop
            for loop in inner
            if not any(loop is not other and loop.header in other.blocks for other in inner)
        }
        incoming: dict[int, Paths] = {entry: {0: Work()}}
        reached: dict[int, Paths] = {}
        for n in _reverse_postorder(self.blocks):
            if n not in incoming:
                continue
            if n in outermost:
                leaving = self._leave(outermost[n])
            else:
                leaving = [(n, {round(self.cost[n]["macs"]): self.cost[n]})]
            for last, paths in leaving:
                arrived = _then(incoming[n], paths)
                for work in arrived.values():
                    _keep_costliest(reached.setdefault(last, {}), work)
                body = outermost[n].blocks if n in outermost else set()
                for following in self.blocks[last].successors:
                    if following in region and following != entry and following not in body:
                        for work in arrived.values():
                            _keep_costliest(incoming.setdefault(following, {}), work)
        return reached

    def _body(self, loop: Loop, reached: dict[int, Paths] | None = None) -> Paths:
        """Paths through one whole iteration."""
        reached = reached or self._reach(loop.blocks, loop.header, loop)
        full: Paths = {}
        for latch in loop.latches:
            for work in reached.get(latch, {}).values():
                _keep_costliest(full, work)
        return full

    def _leave(self, loop: Loop) -> list[tuple[int, Paths]]:
        """For every block that a loop is left from, the paths from its header to there over all iterations.

        A compiler may have peeled one iteration off, so one less than stated is tried too; the sum of the tensor work
        decides. Loops without tensor instructions, which wait for something, run once.
        """
        reached = self._reach(loop.blocks, loop.header, loop)
        full = self._body(loop, reached)
        stated = self.iterations.get(loop.header, 1)
        leaving = []
        for last in sorted(loop.blocks):
            is_exit = self.blocks[last].may_end or any(s not in loop.blocks for s in self.blocks[last].successors)
            if not is_exit or last not in reached:
                continue
            totals: Paths = {}
            for part in reached[last].values():
                for body in full.values():
                    # A test at the top follows whole iterations, one at the bottom ends the last of them.
                    top_tested = part["issue"] < body["issue"] / 2 and part["macs"] < max(body["macs"], 1)
                    for n in {stated, max(stated - 1, 0)}:
                        if top_tested or n > 0:
                            _keep_costliest(totals, body.times(n if top_tested else n - 1).plus(part))
            if totals:
                leaving.append((last, totals))
        return leaving


UNITS = ("issue", "fp32", "alu", "exp", "shared", "tensor")


@dataclass(frozen=True)
class Estimate:
    """Cycles of one multiprocessor for one program.

    Attributes:
        units: cycles per unit, of `UNITS`.
    """

    units: dict[str, float]

    @property
    def bound(self) -> str:
        """The busiest unit."""
        return max(self.units, key=lambda unit: self.units[unit])

    @property
    def cycles(self) -> float:
        """Cycles of the busiest unit."""
        return self.units[self.bound]


def estimate(code: Code, iterations: Sequence[int], macs: int, staged_bytes: int) -> Estimate:
    """Estimates one program.

    Args:
        code: its machine code.
        iterations: how often each of the loops that hold tensor instructions runs, in the order of the program.
        macs: multiply-adds of the tensor cores in the whole program, padding included.
        staged_bytes: bytes of keys and values that the program needs: copies into shared memory are charged for no
            more, because those issued ahead of a loop's end move nothing.

    Raises:
        NotImplementedError: where the code has other loops, or no path does that much tensor work.
    """
    walk = _Walk(code, iterations)
    paths = walk.program()
    rates = RATES[code.target.name]
    if code.target.name == "sm_100":
        # One thread starts products whose extent is in a descriptor, and starts the next block's ahead of the loop:
        # the walk cannot count them, the costliest path of all stands in.
        work = max(paths.values(), key=lambda work: work["issue"])
        units = Work(work.times(code.num_warps) | {"tensor": macs / rates.tensor})
    else:
        per_warp = round(macs * walk.replication(macs) / code.num_warps)
        if per_warp not in paths:
            raise NotImplementedError(
                f"{code.kernel} for {code.target.name}: no path does {per_warp} multiply-adds per warp in "
                f"{list(iterations)} iterations; paths do {sorted(paths)[:8]}"
            )
        units = paths[per_warp].times(code.num_warps)
    units["shared"] += min(units["staged"], staged_bytes / rates.shared_bytes)
    return Estimate({unit: units[unit] for unit in UNITS})
