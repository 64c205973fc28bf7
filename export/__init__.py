"""Phase three, first half: the bundle, exported estimators that need torch and safetensors alone."""
