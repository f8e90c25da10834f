"""How many replicas each deployment shall have: plain functions of what its replicas measured."""
