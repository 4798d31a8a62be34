/* What differs between compilers and processors. No other file has an #if about either.
 *
 * Bits depend on the arithmetic being plain IEEE, so a build that would change it is refused here. */
#ifndef FO_PLATFORM_H
#define FO_PLATFORM_H

#include <float.h>
#include <time.h>

#if !defined(__GNUC__)
#error "fastopt needs GCC or Clang (on Windows: clang-cl or MinGW)"
#endif
#if defined(__FAST_MATH__)
#error "fastopt must not be built with -ffast-math or -Ofast: results would depend on the machine"
#endif
#if FLT_EVAL_METHOD != 0
#error "fastopt needs arithmetic in the operands' own type (on 32-bit x86: -msse2 -mfpmath=sse)"
#endif

#if !defined(FO_INLINE) /* (not where coverage is measured) */
#define FO_INLINE static inline __attribute__((always_inline))
#endif
#define FO_APART static __attribute__((noinline)) /* what is rare and would burden its caller */

/* A word whose lower half comes first in memory. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define FO_LOWER_FIRST(word) ((word) << 16 | (word) >> 16)
#else
#define FO_LOWER_FIRST(word) (word)
#endif

/* Arrays need not be aligned; these types say so to the compiler. */
#define FO_UNALIGNED __attribute__((aligned(1)))
/* For types through which memory is read that others may have written through other types. */
#define FO_STORED __attribute__((aligned(1), may_alias))

/* Ahead of a loop of which no iteration depends on another. (Not `omp simd`: GCC then keeps a slot's
 * local copy in memory, and does not vectorise. Not on 32-bit Arm, whose vectors make subnormal
 * numbers zeros, whatever the floating-point environment says.) */
#if defined(__clang__) && defined(__arm__)
#define FO_INDEPENDENT _Pragma("clang loop vectorize(disable)")
#elif defined(__clang__)
#define FO_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FO_INDEPENDENT _Pragma("GCC ivdep")
#endif

/* Has b and c wait for a. Clang would compute two elements at once on 32-bit Arm, in such vectors. */
#if defined(__clang__) && defined(__arm__)
#define FO_IN_TURN(a, b, c) __asm__("" : "+t"(a), "+t"(b), "+t"(c))
#else
#define FO_IN_TURN(a, b, c) ((void)0)
#endif

/* The compiler's name and version, for fo_compiler(). */
#if defined(__clang__)
#define FO_COMPILER "clang " __clang_version__
#else
#define FO_COMPILER "gcc " __VERSION__
#endif

/* fo_fpenv_enter() saves the thread's floating-point environment and sets round-to-nearest,
 * subnormals kept, no traps; fo_fpenv_leave() puts the saved one back. */
#if defined(__SSE2__)
#include <xmmintrin.h>
typedef unsigned int fo_fpenv;
FO_INLINE fo_fpenv fo_fpenv_enter(void)
{
    fo_fpenv saved = _mm_getcsr();
    _mm_setcsr(0x1F80);
    return saved;
}
FO_INLINE void fo_fpenv_leave(fo_fpenv saved) { _mm_setcsr(saved); }
#elif defined(__aarch64__)
#include <stdint.h>
typedef uint64_t fo_fpenv;
FO_INLINE fo_fpenv fo_fpenv_enter(void)
{
    fo_fpenv saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved)::"memory");
    __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)0) : "memory");
    return saved;
}
FO_INLINE void fo_fpenv_leave(fo_fpenv saved)
{
    __asm__ volatile("msr fpcr, %0" ::"r"(saved) : "memory");
}
#else
#include <fenv.h>
typedef fenv_t fo_fpenv;
FO_INLINE fo_fpenv fo_fpenv_enter(void)
{
    fo_fpenv saved;
    fegetenv(&saved);
    fesetenv(FE_DFL_ENV);
    return saved;
}
FO_INLINE void fo_fpenv_leave(fo_fpenv saved) { fesetenv(&saved); }
#endif

/* Which threading layers are built. */
#if defined(__unix__) || defined(__APPLE__)
#define FO_HAVE_TEAM 1
#else
#define FO_HAVE_TEAM 0
#endif
#if defined(_OPENMP)
#define FO_HAVE_OPENMP 1
#else
#define FO_HAVE_OPENMP 0
#endif

/* A function that a program need not link, where the linker allows that: its address is NULL then.
 * (So a program in C needs an OpenMP runtime only if it asks for that layer.) */
#if defined(__ELF__)
#define FO_OPTIONAL __attribute__((weak))
#else
#define FO_OPTIONAL
#endif

/* A clock for durations. POSIX has one that nobody sets, and declares it to a file that asks
 * (_POSIX_C_SOURCE); C has the time of day. */
FO_INLINE double fo_seconds(void)
{
    struct timespec now;
#if defined(CLOCK_MONOTONIC)
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
#else
    (void)timespec_get(&now, TIME_UTC);
#endif
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Before a sleeping thread is woken: has it run on any processor that the caller of the job may use
 * but the one that its waker is using. (Left alone, some kernels wake a thread where its waker runs,
 * to take turns with it.) */
#if defined(__linux__) && defined(_GNU_SOURCE)
#include <pthread.h>
#include <sched.h>
FO_INLINE void fo_keep_apart(pthread_t thread, pthread_t caller)
{
    cpu_set_t cpus;
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || pthread_getaffinity_np(caller, sizeof cpus, &cpus) != 0)
        return;
    CPU_CLR((unsigned)here, &cpus);
    if (CPU_COUNT(&cpus) == 0) /* there is but one */
        CPU_SET((unsigned)here, &cpus);
    (void)pthread_setaffinity_np(thread, sizeof cpus, &cpus);
}
#else
#define fo_keep_apart(thread, caller) ((void)(thread), (void)(caller))
#endif

/* Tells the processor that a loop only waits. */
#if defined(__SSE2__)
#define FO_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define FO_PAUSE() __asm__ volatile("isb" ::: "memory")
#else
#define FO_PAUSE() ((void)0)
#endif

/* Whether the processor has an instruction set and the operating system saves its registers
 * (the compiler's run-time support looks at both). */
#if defined(__x86_64__) || defined(__i386__)
#define FO_CPU_HAS_AVX2() (__builtin_cpu_supports("avx2") != 0)
#define FO_CPU_HAS_AVX512()                                                                        \
    ((__builtin_cpu_supports("avx512f") != 0) & (__builtin_cpu_supports("avx512vl") != 0) &        \
     (__builtin_cpu_supports("avx512dq") != 0) & (__builtin_cpu_supports("avx512bw") != 0))
#else
#define FO_CPU_HAS_AVX2() 0
#define FO_CPU_HAS_AVX512() 0
#endif

#endif
