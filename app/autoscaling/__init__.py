"""Plans how many replicas each deployment is to have, in plain functions of what its replicas measured."""
