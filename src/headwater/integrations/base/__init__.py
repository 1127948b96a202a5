"""The half of an integration that knows no framework: what a worker does in a step, and which samples it takes.

``steps.Steps`` is the way in; ``headwater.integrations.torch`` shows its use. No file here imports a framework. A
table's gradients and values are torch tensors on the CPU, because the client's table gives them: ``tensor.numpy()`` is
the same memory for whoever has no torch.
"""
