"""What runs in a frontend: vLLM's API server over pools of engines that run elsewhere."""
