"""What tests of bad arguments share."""


def moved(x, device):
    """With its strides, which `to` would not keep."""
    base = x if x._base is None else x._base
    return x if x.is_meta else base.to(device).as_strided(x.shape, x.stride())
