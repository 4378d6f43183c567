"""Sources of backbones: torchvision, timm, packages with weights, and custom code."""
