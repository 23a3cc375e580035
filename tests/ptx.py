"""Runs the PTX of a block of threads in NumPy, with the sparse instructions of `lanes`.

Threads run in lockstep; those that branch forwards wait at the target. Asynchronous copies move
their data when a wait requires it, so a kernel that reads too early reads the old data.
"""

import operator
import re

import lanes
import ml_dtypes
import numpy as np

# the start of the two windows in one memory; addresses are the same in all state spaces
SHARED, GLOBAL = (1024, 1 << 20)

_INTEGER = {
    "neg": operator.neg,
    "add": operator.add,
    "sub": operator.sub,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def run(ptx, memory, parameters, block):
    """Runs one block to its end.

    `memory` holds bytes and is changed; `block` is the index of the block along x, y and z.
    """
    _Block(ptx, memory, parameters, block).run()


def product(ptx, x, w, bias, shape, grid, order="metadata bias y values x"):
    """The result y `[N, M]` that the kernel writes, as uint16 words.

    `order` is the order in which Mosaic makes the operands parameters.
    """
    operands = {
        "metadata": w.metadata,
        "bias": bias,
        "y": np.zeros(shape, np.uint16),
        "values": w.values,
        "x": x,
    }
    operands = {
        name: np.ascontiguousarray(operands[name]).view(np.uint8)
        for name in order.split()
        if operands[name] is not None
    }
    memory, parameters = (
        np.zeros(GLOBAL + sum(data.size + 256 for data in operands.values()), np.uint8),
        {},
    )
    at = GLOBAL
    for name, data in operands.items():
        memory[at : at + data.size] = data.ravel()
        parameters[name] = at
        at += -(-data.size // 256) * 256
    for block in np.ndindex(*grid):
        run(ptx, memory, list(parameters.values()), block)
    y = parameters["y"]
    return memory[y : y + 2 * shape[0] * shape[1]].view(ml_dtypes.bfloat16).reshape(shape)


def _width(kind):
    return int(re.search(r"(\d+)(x2)?$", kind)[1]) * (2 if kind.endswith("x2") else 1)


def _signed(value, bits):
    return (
        ((value.astype(np.int64) << (64 - bits)) >> (64 - bits))
        if bits < 64
        else value.astype(np.int64)
    )


def _float(value):
    return value.astype(np.uint32).view(np.float32)


def _bits(value):
    return np.asarray(value, np.float32).view(np.uint32).astype(np.uint64)


class _Block:
    def __init__(self, ptx, memory, parameters, block):
        self.threads = int(re.search(r"\.(?:req|max)ntid (\d+)", ptx)[1])
        body = re.sub(r"//.*", "", ptx[ptx.index("\n{") :])
        lines = (line.strip() for line in body.splitlines())
        self.program = [line.rstrip(";") for line in lines if re.match(r"[a-z@]|\$L\w+:$", line)]
        self.labels = {line[:-1]: i for i, line in enumerate(self.program) if line.endswith(":")}
        self.memory, self.parameters = memory, parameters
        self.special = {f"%ctaid.{axis}": index for axis, index in zip("xyz", block, strict=True)}
        self.registers = {}
        self.active = np.ones(self.threads, bool)
        self.waiting = {}
        self.groups, self.open = [], []

    def run(self):
        at = 0
        while True:
            line = self.program[at]
            if at in self.waiting:
                self.active |= self.waiting.pop(at)
            at += 1
            if line.endswith(":"):
                continue
            predicate = re.match(r"@(!?)(%p\d+)\s+(.*)", line)
            running = self.active
            if predicate:
                running = running & (self.registers[predicate[2]].astype(bool) ^ bool(predicate[1]))
                line = predicate[3]
            name, _, rest = line.partition(" " if " " in line.split("\t")[0] else "\t")
            operands = (
                [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", rest.strip())]
                if rest.strip()
                else []
            )
            if name == "ret":
                return
            if name.split(".")[0] == "bra":
                target = self.labels[operands[0]]
                if running.sum() == self.active.sum():
                    at = target
                elif running.any():
                    assert target > at, "threads part at a loop"
                    self.waiting[target] = self.waiting.get(target, False) | running
                    self.active = self.active & ~running
                continue
            assert running is self.active or (running == self.active).all() or not running.any(), (
                f"predicated: {line}"
            )
            if running.any():
                self.step(name.split("."), operands)

    def value(self, operand):
        if operand in self.registers:
            return self.registers[operand]
        if operand == "%tid.x":
            return np.arange(self.threads, dtype=np.uint64)
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.uint64)
        number = self.special.get(operand, SHARED if "shmem" in operand else None)
        return np.full(
            self.threads, (int(operand, 0) if number is None else number) % 2**64, np.uint64
        )

    def set(self, register, value, bits=64):
        value = np.asarray(value).astype(np.uint64) & np.uint64(2**bits - 1)
        self.registers[register] = np.where(self.active, value, self.registers.get(register, 0))

    def address(self, operand):
        name, offset = re.match(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand).groups()
        return self.value(name).astype(np.int64) + int(offset or 0)

    def load(self, address, count):
        where = np.where(self.active, address, 0)[:, None] + np.arange(count)
        return self.memory[where]

    def store(self, address, data):
        self.memory[address[self.active][:, None] + np.arange(data.shape[1])] = data[self.active]

    def step(self, name, operands):
        kind, bits = name[-1], 1
        if re.fullmatch(r"[a-z]+\d+(x2)?", kind):
            bits = _width(kind)
        method = getattr(self, f"do_{name[0]}", None)
        if method:
            return method(name, operands, bits)
        values = [self.value(o) for o in operands[1:]]
        if kind == "f32":
            a, b = map(_float, values[:2])
            return self.set(
                operands[0],
                _bits({"add": np.add, "mul": np.multiply, "max": np.maximum}[name[0]](a, b)),
            )
        if name[0] in ("min", "max"):
            values = [_signed(v, bits) if kind[0] == "s" else v for v in values]
            return self.set(operands[0], getattr(np, f"{name[0]}imum")(*values), bits)
        return self.set(operands[0], _INTEGER[name[0]](*values), bits)

    def do_bar(self, name, operands, bits):
        assert self.active.all()

    do_fence = do_bar

    def do_mov(self, name, operands, bits):
        self.set(operands[0], self.value(operands[1]), bits)

    do_cvta = do_mov

    def do_cvt(self, name, operands, bits):
        values = [self.value(o) for o in operands[1:]]
        if "bf16" in name[2]:
            parts = [
                _float(v).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint64)
                for v in values
            ]
            return self.set(
                operands[0], parts[0] if len(parts) == 1 else parts[0] << np.uint64(16) | parts[1]
            )
        assert re.fullmatch(r"cvt\.[us]\d+\.u\d+", ".".join(name)), name
        return self.set(operands[0], values[0], _width(name[1]))

    def product(self, name, operands, bits):
        """The product of two integers, and its width."""
        a, b = (self.value(o) for o in operands)
        if name[1] == "lo":
            return a * b, bits
        assert name[1] == "wide" and bits == 32, name
        return (_signed(a, 32) * _signed(b, 32)).astype(np.uint64) if name[2][
            0
        ] == "s" else a * b, 64

    def do_mul(self, name, operands, bits):
        self.set(operands[0], *self.product(name, operands[1:], bits))

    def do_mad(self, name, operands, bits):
        product, bits = self.product(name, operands[1:3], bits)
        self.set(operands[0], product + self.value(operands[3]), bits)

    def do_shl(self, name, operands, bits):
        self.set(operands[0], self.value(operands[1]) << self.value(operands[2]), bits)

    def do_shr(self, name, operands, bits):
        value, by = self.value(operands[1]), self.value(operands[2])
        self.set(
            operands[0],
            _signed(value, bits) >> by.astype(np.int64) if name[1][0] == "s" else value >> by,
            bits,
        )

    def do_bfe(self, name, operands, bits):
        value, start, length = (self.value(o) for o in operands[1:])
        assert name[1][0] == "u"
        self.set(operands[0], value >> start & (np.uint64(1) << length) - np.uint64(1), bits)

    def do_selp(self, name, operands, bits):
        self.set(
            operands[0],
            np.where(
                self.registers[operands[3]].astype(bool),
                self.value(operands[1]),
                self.value(operands[2]),
            ),
        )

    def do_setp(self, name, operands, bits):
        a, b = (self.value(o) for o in operands[1:3])
        if name[-1][0] == "s":
            a, b = _signed(a, bits), _signed(b, bits)
        elif bits < 64:
            a, b = (v & np.uint64(2**bits - 1) for v in (a, b))
        outcome = _COMPARE[name[1]](a, b)
        if len(name) == 4:  # with another predicate
            outcome = _INTEGER[name[2]](outcome, self.value(operands[3]).astype(bool))
        self.set(operands[0], outcome)

    def do_shfl(self, name, operands, bits):
        assert self.active.all()
        thread, number = np.arange(self.threads), int(operands[2])
        source = {"bfly": thread ^ number, "idx": thread // 32 * 32 + number}[name[2]]
        self.set(operands[0], self.value(operands[1])[source])

    def do_elect(self, name, operands, bits):
        register, predicate = operands[0].split("|")
        self.set(register, 0 * self.value("%tid.x"))
        self.set(predicate, self.value("%tid.x") % np.uint64(32) == 0)

    def do_prmt(self, name, operands, bits):
        a, b, selector = (self.value(o) for o in operands[1:])
        pool, out = a | b << np.uint64(32), np.zeros(self.threads, np.uint64)
        for i in range(4):
            place = selector >> np.uint64(4 * i) & np.uint64(15)
            assert (place < 8).all()
            out |= (pool >> place * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
        self.set(operands[0], out)

    def do_ld(self, name, operands, bits):
        if name[1] == "param::entry" or name[1] == "param":
            return self.set(
                operands[0], self.parameters[int(re.search(r"param_(\d+)", operands[1])[1])]
            )
        targets = operands[0].strip("{}").split(",")
        data = self.load(self.address(operands[1]), bits // 8 * len(targets))
        for i, target in enumerate(targets):
            piece = np.ascontiguousarray(data[:, i * bits // 8 : (i + 1) * bits // 8])
            self.set(target.strip(), piece.view(f"<u{bits // 8}")[:, 0])
        return None

    def do_st(self, name, operands, bits):
        sources = [self.value(o.strip()) for o in operands[1].strip("{}").split(",")]
        data = np.stack(sources, 1).astype(f"<u{bits // 8}").view(np.uint8)
        self.store(self.address(operands[0]), data)

    def do_cp(self, name, operands, bits):
        assert name[1] == "async"
        if name[2] == "commit_group":
            self.groups.append(self.open)
            self.open = []
        elif name[2] == "wait_group":
            while len(self.groups) > int(operands[0]):
                for target, source, count in self.groups.pop(0):
                    self.store(target, self.load(source, count))
        else:
            self.open.append(
                (self.address(operands[0]), self.address(operands[1]), int(operands[2]))
            )

    def do_ldmatrix(self, name, operands, bits):
        # warp, matrix, row, pair
        rows = (
            self.load(self.address(operands[1]), 16)
            .view("<u4")
            .reshape(self.threads // 32, 4, 8, 4)
        )
        for i, target in enumerate(operands[0].strip("{}").split(",")):
            self.set(target.strip(), rows[:, i].reshape(self.threads))

    def do_mma(self, name, operands, bits):
        assert name[1:6] == ["sp::ordered_metadata", "sync", "aligned", "m16n8k32", "row"], name
        lists = [[o.strip() for o in operand.strip("{}").split(",")] for operand in operands[:4]]
        registers = [
            np.stack([self.value(o) for o in one], 1).astype(np.uint32) for one in lists[1:]
        ]
        a, b = (
            r.view(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32) for r in registers[:2]
        )
        c, words = registers[2].view(np.float32), self.value(operands[4])
        warps = [slice(first, first + 32) for first in range(0, self.threads, 32)]
        d = np.concatenate(
            [lanes.mma_sp_m16n8k32(a[w], b[w], c[w], words[w], int(operands[5], 0)) for w in warps]
        )
        for target, column in zip(lists[0], d.T, strict=True):
            self.set(target, _bits(np.ascontiguousarray(column)))
