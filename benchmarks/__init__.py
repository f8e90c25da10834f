"""Developers' experiments; no product module imports them, and no wheel has them."""
