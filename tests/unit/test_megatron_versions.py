"""What differs between the versions of Megatron-Core, with the one that is installed."""

from __future__ import annotations

import inspect
import logging
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch.utils import cpp_extension

from megatron_tempo.models.megatron_compat import versions
from megatron_tempo.models.megatron_compat.torch_private import hide_missing_cuda


def test_the_version_is_the_one_of_this_python() -> None:
    assert metadata.version("megatron-core").startswith("0.16.") == versions.IS_0_16
    assert hasattr(MLP, "as_mlp_submodule") != versions.IS_0_16


def test_the_models_config_stays_without_the_sum_of_the_norms_gradients() -> None:
    """Megatron sums them over the tensor ranks if its config says so, which OLMo3's sharded norms must not be."""
    config: Any = SimpleNamespace(qk_layernorm=False, others=1)
    own = versions.config_of_attention(config, SimpleNamespace(q_layernorm=object()))  # type: ignore[arg-type]
    assert (config.qk_layernorm, own.qk_layernorm, own.others) == (False, not versions.IS_0_16, 1)
    assert versions.config_of_attention(config, SimpleNamespace(q_layernorm=None)) is config  # type: ignore[arg-type]
    refuses = "are disabled" in inspect.getsource(SelfAttention)
    assert refuses != versions.IS_0_16, "config_of_attention is for the versions that refuse norms without qk_layernorm"


def test_advice_to_developers_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    versions.quiet_deprecations()
    versions.quiet_deprecations()
    for module, text in versions._DEVELOPERS_ADVICE:
        logger = logging.getLogger(f"megatron.core.{module}")
        assert len([one for one in logger.filters if one is versions._is_for_users]) == 1
        logger.warning(f"{text} and more")
        logger.warning(f"something else about {module}")
        if not versions.IS_0_16:
            source = Path(megatron.core.__path__[0], *module.split(".")).with_suffix(".py").read_text()
            assert text in source, "the installed version says it in other words"
    assert caplog.messages == [f"something else about {module}" for module, _ in versions._DEVELOPERS_ADVICE]


def test_a_cpu_with_cudas_compiler_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    hide_missing_cuda()
    hide_missing_cuda()
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
    logger.warning("another matter")
    assert caplog.messages == ["another matter"]
    assert '"No CUDA runtime is found, using' in Path(cpp_extension.__file__).read_text()
