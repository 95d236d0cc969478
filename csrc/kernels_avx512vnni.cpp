#define NGAME_ISA avx512vnni
#define NGAME_VECTOR_BYTES 64
#include "kernels-inl.h"
