"""Values that live in TFF's workers, and rounds on them."""
