"""An expert's bytes, from the checkpoint's files to a row of host memory."""
