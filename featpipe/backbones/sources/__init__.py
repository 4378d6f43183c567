"""Where backbones come from: torchvision, timm, packages with weights, the user's own code."""
