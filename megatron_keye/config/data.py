"""The `data` section is the data pipeline's own schema."""

from keye_data.settings import DataConfig, ImageConfig, SourceConfig, VideoConfig

__all__ = ["DataConfig", "ImageConfig", "SourceConfig", "VideoConfig"]
