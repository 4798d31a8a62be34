/* Counts the parallel regions that are entered, loaded ahead of GCC's OpenMP runtime. */
#include <dlfcn.h>

int regions;

void GOMP_parallel(void (*act)(void *), void *context, unsigned threads, unsigned flags)
{
    void (*runtime)(void (*)(void *), void *, unsigned, unsigned) = 0;
    *(void **)&runtime = dlsym(dlopen("libgomp.so.1", RTLD_LAZY), "GOMP_parallel");
    regions++;
    runtime(act, context, threads, flags);
}
