"""When two results of floating arithmetic are the same but for rounding, on every processor."""

import numpy as np
import tensorflow as tf

_UNITS = 8.0  # in the last place: the least that may be asked for


def assert_near(found, expected, rtol=2e-6, err_msg=""):
    """Every element is within `rtol` of the largest magnitude in its tensor.

    Kernels for different processors add up in different orders. An element that is small beside the
    others of its tensor carries their rounding, so a bound by the element itself holds on some
    processors and not on others. What a wrong formula changes, it changes by much more.

    Args:
      found: An array, or a structure of arrays.
      expected: The truth: of the same structure and shapes, or one number for all elements.
      rtol: The bound. It must leave room for a few units in the last place of the coarser dtype.
      err_msg: What to say besides.
    """
    if tf.nest.is_nested(found):
        tf.nest.assert_same_structure(found, expected)
        for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
            assert_near(a, b, rtol, err_msg)
        return
    a, b = np.asarray(found), np.asarray(expected)
    assert b.shape in ((), a.shape), (a.shape, b.shape, err_msg)
    floats = [x.dtype for x in (a, b) if np.issubdtype(x.dtype, np.floating)]
    room = _UNITS * max((np.finfo(dtype).eps for dtype in floats), default=0.0)
    assert rtol >= room, f"rtol={rtol} is finer than {_UNITS} units in the last place, {room}"
    largest = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    np.testing.assert_allclose(a, b, rtol=0.0, atol=rtol * largest, err_msg=err_msg)
