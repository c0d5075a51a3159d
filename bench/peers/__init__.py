"""What eapcore is compared with: the model in plain PyTorch, hooks, and the published tools."""
