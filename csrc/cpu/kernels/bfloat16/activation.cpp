// The activations' passes, for these instruction sets as well.
#include "cpu/kernels/activation.cpp"
