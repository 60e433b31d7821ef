"""Of gradients that a kernel adds up, which we do not ask for."""


def get_dummy_wgrad(*_: object, **__: object) -> None:
    raise NotImplementedError("gradient_accumulation_fusion is off")
