/* The threading layer of OpenMP: a step is one parallel region of a fixed number of threads, in which
 * a thread has the same items in both passes and in every step. So the memory that it touched first
 * stays its own, and OMP_PLACES and OMP_PROC_BIND say where that is.
 *
 * A region ends when its last thread has run. Right after a matrix product, whose threads still spin,
 * or on a busy machine, that thread may first have to wait milliseconds for a time slice. */
#include "team.h"

#if FO_HAVE_OPENMP

#include <omp.h>

int fo_region_processors(void) { return omp_get_num_procs(); }

int fo_share_in_region(int members, int64_t n, const fo_passes *passes, void *context)
{
    int came = 1;
    bool second_follows = true;
#pragma omp parallel num_threads(members)
    {
        const int rank = omp_get_thread_num(), here = omp_get_num_threads();
        const int64_t begin = fo_share_begin(n, rank, here);
        const int64_t end = fo_share_begin(n, rank + 1, here);
        if (passes->first) {
            passes->first(context, begin, end);
#pragma omp barrier
            if (rank == 0)
                second_follows = passes->between(context);
#pragma omp barrier
        }
        if (second_follows)
            passes->second(context, begin, end);
        if (rank == 0)
            came = here;
    }
    return came;
}

#endif
