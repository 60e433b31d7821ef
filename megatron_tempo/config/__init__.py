from megatron_tempo.config.schema import Config

__all__ = ["Config"]
