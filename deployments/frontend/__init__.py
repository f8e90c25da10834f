"""The frontend deployment, and how it finds and calls the replicas."""
