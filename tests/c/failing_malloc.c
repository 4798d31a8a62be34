/* A malloc to be loaded ahead of the C library's (glibc's), in which chosen allocations of the
 * calling thread fail: for tests/robustness/test_allocations.py. */
#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *old, size_t size);
void *__libc_memalign(size_t alignment, size_t size);

static __thread long to_go, to_fail, failed;

/* After `first` - 1 more allocations, the next `count` fail. */
void arm(long first, long count)
{
    to_go = first;
    to_fail = count;
    failed = 0;
}

/* No more failures; how many there were. */
long disarm(void)
{
    to_go = 0;
    return failed;
}

static int fails(void)
{
    if (to_go == 0 || --to_go > 0)
        return 0;
    to_go = --to_fail > 0;
    failed++;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }

void *calloc(size_t n, size_t size) { return fails() ? NULL : __libc_calloc(n, size); }

void *realloc(void *old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }

void *memalign(size_t alignment, size_t size)
{
    return fails() ? NULL : __libc_memalign(alignment, size);
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    void *const found = memalign(alignment, size);
    if (found)
        *memory = found;
    return found ? 0 : ENOMEM;
}
