"""The kernels' benches: the shapes and ways of each op, what checks them first, and what compiles them."""
