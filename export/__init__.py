"""Phase three, first half: the bundle, estimators that need torch and safetensors alone."""
