"""The ops in Triton, for GPUs with or without a CUDA toolkit (NVIDIA, AMD).

One module an op, with functions named and called like the raw kernels of ``fused_mlp.ops.schemas``:

    normalize.py, linear_relu.py, batch_norm_leaky_relu.py, research_net.py
    linear_act.py, batch_norm_act.py (other activations, by the same kernels)

The rest is what they share: ``launch`` (streams, devices, dtypes), ``views`` (tensors as strided
matrices, and how one is cut into tiles and parts), ``moments`` (means and variances merged in a
fixed order), ``matmul`` (products that keep to their registers), ``activations`` (values and
derivatives), ``philox`` (the dropout mask), ``merge`` (partial sums), ``tiles`` (tile sizes) and
``tuning``. docs/triton.md describes them.

Nothing is imported here, so that the package can ask for one op without loading the others.
"""
