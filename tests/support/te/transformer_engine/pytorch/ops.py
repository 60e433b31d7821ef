"""Of operations that can be fused, the names that Megatron-Core requires when it is imported."""


class Sequential:
    pass


class FusibleOperation:
    pass
