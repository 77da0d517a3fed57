"""The built-in networks for images: dimensions only, each with the line that says where they come from."""

from __future__ import annotations

from typing import Final

from firsttoken.image_network import ImageNetworkConfig

RESNET_50: Final = ImageNetworkConfig(
    name="resnet-50", family="resnet", side=224, stem=64, stages=((3, 64), (4, 128), (6, 256), (3, 512)), classes=1000,
    source="resnet50 of torchvision.models, whose blocks reduce the image in their 3x3 convolution",
)  # fmt: skip

IMAGE_NETWORKS: Final = {network.name: network for network in (RESNET_50,)}
