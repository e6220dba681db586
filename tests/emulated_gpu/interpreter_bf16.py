"""Makes bf16 in Triton's interpreter behave as on a GPU."""


def bf16_of_the_interpreter() -> None:
    """Fixes two faults of the interpreter: it truncates bf16 instead of rounding, and multiplies bits as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def narrowed(data):
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, to):
        if source.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return widened(source)
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrowed(source.data), tl.bfloat16)
        return cast(self, source, to)

    builder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, cast_impl)
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
