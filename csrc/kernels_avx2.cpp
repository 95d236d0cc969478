#define NGAME_ISA avx2
#define NGAME_VECTOR_BYTES 32
#include "kernels-inl.h"
