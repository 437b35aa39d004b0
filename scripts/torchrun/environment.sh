#!/usr/bin/env bash
# What the layout wants of CUDA, for the words of a stage; what is set already stays. Sourced by the other scripts.

# Tensor parallel ranks overlap their communication with matrix products. Kernels then have to start in the order of
# their launches, communication first, and only a single hardware queue keeps that order (before Blackwell). Without
# tensor parallelism more queues are better: gradients are reduced beside the backward pass.
case " $* " in
*" parallel=tp"[2-9]* | *" parallel.tensor_model_parallel_size="[2-9]*)
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    ;;
esac
# A site may need NCCL_SOCKET_IFNAME or NCCL_IB_HCA to find the fast network; NCCL_DEBUG=INFO shows what it found.
