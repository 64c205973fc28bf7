"""Phase one: find the MoE layers of a model, record what they route, store it and read it back."""
