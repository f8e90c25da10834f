"""Which replicas serve a sequence, and where its prompt is prefilled; start at router.py."""
