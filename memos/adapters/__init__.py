"""The engine of parametric memory: adapters as slabs, their files, merges and training."""
