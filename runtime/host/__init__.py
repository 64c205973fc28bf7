"""Decoding that the host decides: the twin of `runtime/device/`, file by file."""
