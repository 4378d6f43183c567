"""Resizing to Pillow's bits, by table look-ups on a CPU and by matrix products on a GPU."""
