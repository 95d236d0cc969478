#define NGAME_ISA dotprod
#define NGAME_VECTOR_BYTES 16
#include "kernels-inl.h"
