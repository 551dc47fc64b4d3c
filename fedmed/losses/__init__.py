"""Losses: free functions on tensors. Those a configuration can name take (logits, targets) as the model and a batch
give them.
"""
