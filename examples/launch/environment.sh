# What every launch on AWS sets. Values that are set already stay.
#
# An EFA stack of today (libfabric 1.18 and aws-ofi-nccl 1.7 or newer) finds EFA and GPUDirect by itself:
# FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA and NCCL_PROTO are not for it.

export FI_EFA_USE_HUGE_PAGE="${FI_EFA_USE_HUGE_PAGE:-0}"            # huge pages fail in forked data loaders
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^docker,lo,veth}"  # the start goes over a node's own interface
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# What is known after a failure: torch's own collectives, and the stack of a crash.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
