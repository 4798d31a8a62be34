/* The bandwidth bound of a step: a pass that reads and writes the bytes that a step reads and
 * writes, and computes nothing. No loop over the same arrays can be faster by much; benchmarks
 * measure against it, on the arrays of the step itself, which it leaves as they are. Each thread
 * moves an even part of the words: nothing of the driver is in it. */
#include "kernels.h"
#include "team.h"

typedef struct {
    const fo_bandwidth_tensor *tensors;
    int64_t n_tensors;
    uint32_t taken;
    fo_move *move;
} traffic;

/* Moves words begin to end, counted through all tensors. */
static void move_words(void *context, int64_t begin, int64_t end)
{
    const traffic *t = context;
    int64_t first = 0;
    for (int64_t i = 0; i < t->n_tensors; first += t->tensors[i++].words) {
        const fo_bandwidth_tensor *tensor = &t->tensors[i];
        const int64_t from = begin > first ? begin - first : 0;
        const int64_t to = end - first < tensor->words ? end - first : tensor->words;
        if (from < to)
            t->move(from, to, tensor->updated, tensor->n_updated, tensor->read, t->taken);
    }
}

void fo_bandwidth_run(const fo_bandwidth_tensor *tensors, int64_t n_tensors, uint32_t taken,
                      int threads)
{
    traffic t = {tensors, n_tensors, taken, fo_active_table()->move};
    int64_t words = 0;
    for (int64_t i = 0; i < n_tensors; i++)
        words += tensors[i].words;
    const fo_crew crew = {fo_layer_active(), .exact = true, .members = threads};
    fo_share(&crew, words, words, &(fo_passes){.second = move_words}, &t);
}
