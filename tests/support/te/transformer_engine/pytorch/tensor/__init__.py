"""The class that Megatron-Core asks whether a weight is in FP8: none is."""


class QuantizedTensor:
    pass
