"""The white list: for each opcode with its types, what it computes. An opcode that is not here is refused by name.

`RULES[opcode]` is (result form, source forms, expression). A form is how the bits of a register are read: u, s, f with
16, 32 or 64 bits, or b, a predicate. The expression names sources {0}, {1}, ... and functions of
kernels.emulator.arithmetic as A.name. What touches lanes, memory or control flow is in `SPECIAL`, by its generator in
kernels.emulator.codegen.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    result: str
    sources: tuple[str, ...]
    expression: str


RULES: dict[str, Rule] = {}


# of floats; with u: true if either is NaN, the negation of the ordered opposite
COMPARISONS = {
    "eq": "{0} == {1}", "ne": "({0} < {1}) | ({0} > {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}", "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "~({0} == {1})", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip


def _rule(opcode: str, result: str, sources: str, expression: str) -> None:
    assert opcode not in RULES, opcode
    RULES[opcode] = Rule(result, tuple(sources.split()), expression)


def _float32(opcode: str, sources: int, expression: str, result: str = "f32") -> None:
    """And its .ftz: subnormal sources and results are zeros of their sign. opcode: {} is where that stands."""
    _rule(opcode.format(""), result, " ".join(["f32"] * sources), expression)
    flushed = expression.replace("{", "A.flush({").replace("}", "})")
    _rule(
        opcode.format(".ftz"), result, " ".join(["f32"] * sources), flushed if result == "b" else f"A.flush({flushed})"
    )


def _integers() -> None:
    for bits in (16, 32, 64):
        u, s = f"u{bits}", f"s{bits}"
        for kind in (u, s):
            _rule(f"add.{kind}", u, f"{u} {u}", "{0} + {1}")
            _rule(f"sub.{kind}", u, f"{u} {u}", "{0} - {1}")
            _rule(f"mul.lo.{kind}", u, f"{u} {u}", "{0} * {1}")
            _rule(f"mad.lo.{kind}", u, f"{u} {u} {u}", "{0} * {1} + {2}")
            _rule(f"min.{kind}", kind, f"{kind} {kind}", "np.minimum({0}, {1})")
            _rule(f"max.{kind}", kind, f"{kind} {kind}", "np.maximum({0}, {1})")
            _rule(f"div.{kind}", kind, f"{kind} {kind}", "A.divide({0}, {1})")
            _rule(f"rem.{kind}", kind, f"{kind} {kind}", "A.remainder({0}, {1})")
            _rule(f"shr.{kind}", kind, f"{kind} u32", "A.shift_right({0}, {1})")
            for name, sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
                _rule(f"setp.{name}.{kind}", "b", f"{kind} {kind}", f"{{0}} {sign} {{1}}")
        for kind in (u, s, f"b{bits}"):
            _rule(f"setp.eq.{kind}", "b", f"{u} {u}", "{0} == {1}")
            _rule(f"setp.ne.{kind}", "b", f"{u} {u}", "{0} != {1}")
            _rule(f"selp.{kind}", u, f"{u} {u} b", "np.where({2}, {0}, {1})")
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            _rule(f"{name}.b{bits}", u, f"{u} {u}", f"{{0}} {sign} {{1}}")
        _rule(f"not.b{bits}", u, u, "~{0}")
        _rule(f"shl.b{bits}", u, f"{u} u32", "A.shift_left({0}, {1})")
        _rule(f"neg.s{bits}", u, u, "-{0}")
        _rule(f"abs.s{bits}", s, s, "np.abs({0})")
    for s, wide in (("s32", "s64"), ("u32", "u64"), ("s16", "s32"), ("u16", "u32")):
        product = f"np.multiply({{0}}, {{1}}, dtype=A.{wide[0].upper()}{int(wide[1:]) // 8})"
        _rule(f"mul.wide.{s}", wide, f"{s} {s}", product)
        _rule(f"mad.wide.{s}", wide, f"{s} {s} {wide}", product + " + {2}")
    for kind in ("u32", "s32"):
        _rule(f"mul.hi.{kind}", kind, f"{kind} {kind}", "A.high({0}, {1})")
        _rule(f"bfe.{kind}", kind, f"{kind} u32 u32", "A.field({0}, {1}, {2})")
    _rule("prmt.b32", "u32", "u32 u32 u32", "A.permute({0}, {1}, {2})")
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        _rule(f"{name}.pred", "b", "b b", f"{{0}} {sign} {{1}}")
    _rule("not.pred", "b", "b", "~{0}")


def _floats() -> None:
    for opcode, expression in {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}"}.items():
        for rounding in ("", ".rn"):
            _float32(f"{opcode}{rounding}{{}}.f32", 2, expression)
        _rule(f"{opcode}.f16", "f16", "f16 f16", expression)
        for pair in ("f16x2", "bf16x2"):
            _rule(f"{opcode}.{pair}", "u32", "u32 u32", f"A.{opcode}_{pair}({{0}}, {{1}})")
            _rule(f"{opcode}.rn.{pair}", "u32", "u32 u32", f"A.{opcode}_{pair}({{0}}, {{1}})")
    _float32("fma.rn{}.f32", 3, "A.fma({0}, {1}, {2})")
    _rule("fma.rn.f16", "f16", "f16 f16 f16", "A.fma({0}, {1}, {2})")
    _rule("fma.rn.bf16", "u16", "u16 u16 u16", "A.fma_bf16({0}, {1}, {2})")
    for pair in ("f16x2", "bf16x2"):
        _rule(f"fma.rn.{pair}", "u32", "u32 u32 u32", f"A.fma_{pair}({{0}}, {{1}}, {{2}})")
    for name, greatest in (("max", True), ("min", False)):
        for suffix, nan in (("", False), (".NaN", True)):
            _float32(f"{name}{{}}{suffix}.f32", 2, f"A.extreme({{0}}, {{1}}, {greatest}, {nan})")
            _rule(f"{name}{suffix}.f16", "f16", "f16 f16", f"A.extreme({{0}}, {{1}}, {greatest}, {nan})")
            for pair in ("f16x2", "bf16x2"):
                code = f"A.extreme_{pair}({{0}}, {{1}}, {greatest}, {nan})"
                _rule(f"{name}{suffix}.{pair}", "u32", "u32 u32", code)
    _rule("neg.f32", "u32", "u32", "{0} ^ A.U4.type(0x80000000)")
    _rule("abs.f32", "u32", "u32", "{0} & A.U4.type(0x7FFFFFFF)")
    _rule("abs.ftz.f32", "f32", "f32", "np.abs(A.flush({0}))")
    _rule("neg.ftz.f32", "f32", "f32", "-A.flush({0})")
    _rule("neg.f16", "u16", "u16", "{0} ^ A.U2.type(0x8000)")
    for pair in ("f16x2", "bf16x2"):
        _rule(f"neg.{pair}", "u32", "u32", "{0} ^ A.U4.type(0x80008000)")
        _rule(f"abs.{pair}", "u32", "u32", "{0} & A.U4.type(0x7FFF7FFF)")
    for name in ("div.full", "div.rn"):
        _float32(f"{name}{{}}.f32", 2, "{0} / {1}")
    _float32("div.approx{}.f32", 2, "A.divide_approx({0}, {1})")
    _float32("ex2.approx{}.f32", 1, "np.exp2({0})")
    _float32("lg2.approx{}.f32", 1, "np.log2({0})")
    _float32("rsqrt.approx{}.f32", 1, "A.rsqrt({0})")
    for rounding in ("rn", "approx"):
        _float32(f"sqrt.{rounding}{{}}.f32", 1, "np.sqrt({0})")
        _float32(f"rcp.{rounding}{{}}.f32", 1, "A.F4.type(1) / {0}")
    # the sign of the first, the value of the second
    _rule("copysign.f32", "u32", "u32 u32", "({0} & A.U4.type(0x80000000)) | ({1} & A.U4.type(0x7FFFFFFF))")
    for name, expression in COMPARISONS.items():
        _float32(f"setp.{name}{{}}.f32", 2, expression, "b")
        _rule(f"setp.{name}.f16", "b", "f16 f16", expression)
    _rule("selp.f32", "u32", "u32 u32 b", "np.where({2}, {0}, {1})")


def _conversions() -> None:
    """cvt names its result first: cvt.f32.bf16 widens."""
    for to in (16, 32, 64):
        for source in (16, 32, 64):
            for target_kind in "us":
                for kind in "us":
                    if to != source or target_kind != kind:
                        # widening extends by the source's sign, narrowing keeps the lowest bits
                        code = f"{{0}}.astype(A.{kind.upper()}{to // 8})" if to != source else "{0}"
                        _rule(f"cvt.{target_kind}{to}.{kind}{source}", f"{kind}{to}", f"{kind}{source}", code)
    # an 8-bit source lies in the lowest bits of a wider register
    for to in (16, 32, 64):
        _rule(f"cvt.u{to}.u8", f"u{to}", "u16", f"({{0}} & A.U2.type(255)).astype(A.U{to // 8})")
        _rule(f"cvt.s{to}.s8", f"s{to}", "u16", f"{{0}}.astype(A.U1).view(np.int8).astype(A.S{to // 8})")
    _rule("cvt.f32.bf16", "f32", "u16", "A.f32_from_bf16({0})")
    _rule("cvt.f32.f16", "f32", "f16", "{0}.astype(A.F4)")
    _rule("cvt.rn.bf16.f32", "u16", "f32", "A.bf16_from_f32({0})")
    _rule("cvt.rn.f16.f32", "u16", "f32", "A.f16_from_f32({0})")
    # the first source goes to the upper half
    _rule("cvt.rn.bf16x2.f32", "u32", "f32 f32", "A.pack(A.bf16_from_f32({1}), A.bf16_from_f32({0}))")
    _rule("cvt.rn.f16x2.f32", "u32", "f32 f32", "A.pack(A.f16_from_f32({1}), A.f16_from_f32({0}))")
    _rule("cvt.rna.tf32.f32", "u32", "f32", "A.tf32_from_f32({0})")
    for bits in (16, 32, 64):
        for kind in "us":
            _rule(f"cvt.rn.f32.{kind}{bits}", "f32", f"{kind}{bits}", "{0}.astype(A.F4)")
            if bits > 16:
                dtype = f"A.{kind.upper()}{bits // 8}"
                for rounding, function in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
                    code = f"A.to_integer(np.{function}({{0}}), {dtype})"
                    _rule(f"cvt.{rounding}.{kind}{bits}.f32", f"{kind}{bits}", "f32", code)
    for rounding, function in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
        _float32(f"cvt.{rounding}{{}}.f32.f32", 1, f"np.{function}({{0}})")
    _float32("cvt{}.sat.f32.f32", 1, "np.nan_to_num(np.fmin(np.fmax({0}, 0), 1) + A.F4.type(0), nan=0.0)")


_integers()
_floats()
_conversions()

_MEMORY_TYPES = [
    f"{vector}{kind}{bits}"
    for vector in ("", "v2.", "v4.")
    for kind in "bus"
    for bits in (8, 16, 32, 64)
    if (vector, bits) != ("v4.", 64)
]
# opcode -> name of the method that emits it
SPECIAL: dict[str, str] = {
    **{f"ld.{space}.{kind}": "load" for space in ("global", "shared") for kind in _MEMORY_TYPES},
    **{f"st.{space}.{kind}": "store" for space in ("global", "shared") for kind in _MEMORY_TYPES},
    **{f"ld.param.{kind}{bits}": "parameter" for kind in "bus" for bits in (8, 16, 32, 64)},
    **{f"mov.{kind}": "move" for kind in ("b16", "u16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "pred")},
    **{f"cp.async.{cache}.shared.global": "async_copy" for cache in ("ca", "cg")},
    **{f"setp.{name}.f16x2": "compare_pairs" for name in COMPARISONS},
    "cp.async.commit_group": "commit",
    "cp.async.wait_group": "wait",
    "bar.sync": "barrier",
    "bar.warp.sync": "warp_barrier",
    **{
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16": "load_matrix"
        for count in (1, 2, 4)
        for trans in ("", ".trans")
    },
    **{f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32": "mma" for kind in ("bf16", "f16")},
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "mma",
    **{f"shfl.sync.{how}.b32": "shuffle" for how in ("bfly", "idx", "up", "down")},
    **{f"redux.sync.{how}.{kind}32": "reduce" for how in ("add", "min", "max") for kind in "us"},
    "bra": "branch",
    "bra.uni": "branch",
    "ret": "branch",
}


# class of an opcode in a profile, by its start; else "float" by its type, else "integer"
_KINDS = {
    "mma": "mma", "ldmatrix": "ldmatrix", "ld.shared": "shared load", "st.shared": "shared store",
    "ld.global": "global load", "st.global": "global store", "cp.async.ca": "async copy", "cp.async.cg": "async copy",
    "cp.async": "async control", "bar": "barrier", "shfl": "shuffle", "redux": "shuffle", "bra": "control",
    "ret": "control", "ex2": "special", "lg2": "special", "rsqrt": "special", "sqrt": "special", "rcp": "special",
    "cvt": "conversion", "mov": "move", "ld.param": "move", "setp": "predicate", "selp": "predicate",
}  # fmt: skip
_FLOATS = ("f32", "f16", "f16x2", "bf16", "bf16x2")


def kind_of(opcode: str) -> str:
    """The class that a profile counts it in."""
    kind = next((kind for start, kind in _KINDS.items() if opcode.startswith(start)), None)
    last = opcode.rsplit(".", 1)[-1]
    return kind or ("predicate" if last == "pred" else "float" if last in _FLOATS else "integer")
