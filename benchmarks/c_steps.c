/* Steps of Adam through the C interface, for overhead.py to time. */
#include <fastopt.h>
#include <stdlib.h>

typedef struct {
    const fo_api *fo;
    fo_optimizer *opt;
    int64_t n;
    float *grads; /* one after the other */
    int64_t size; /* of each */
} model;

/* A model of n arrays; NULL if that fails. It is never freed. */
model *make(const fo_api *fo, int64_t n, int64_t size)
{
    model *m = calloc(1, sizeof *m);
    float *arrays = calloc((size_t)(4 * n * size), sizeof *arrays);
    int64_t *counters = calloc((size_t)n, sizeof *counters);
    if (!m || !arrays || !counters)
        return NULL;
    *m = (model){.fo = fo, .n = n, .grads = arrays, .size = size};
    for (int64_t i = 0; i < n * size; i++)
        arrays[i] = 0.01f;
    fo_status status = fo->create("adam", 1, n, &m->opt);
    for (int64_t i = 0; i < n && !status; i++) {
        float *const param = arrays + (n + i) * size;
        const fo_array grad = fo_dense(FO_F32, arrays + i * size), p = fo_dense(FO_F32, param);
        const fo_array exp_avg = fo_dense(FO_F32, param + n * size);
        const fo_array exp_avg_sq = fo_dense(FO_F32, param + 2 * n * size);
        status = fo->set_param(m->opt, i, 0, size, &p, &counters[i]) ||
                 fo->set_state(m->opt, i, "exp_avg", &exp_avg) ||
                 fo->set_state(m->opt, i, "exp_avg_sq", &exp_avg_sq) ||
                 fo->set_grad(m->opt, i, &grad);
    }
    return status ? NULL : m;
}

/* Some steps, before each of which the gradients may be set anew. Returns how many failed. */
int run(model *m, int steps, int set_grads)
{
    int failed = 0;
    while (steps-- > 0) {
        fo_array grad = fo_dense(FO_F32, m->grads);
        for (int64_t i = 0; set_grads && i < m->n; i++) {
            grad.data = m->grads + i * m->size;
            failed += m->fo->set_grad(m->opt, i, &grad) != FO_OK;
        }
        failed += m->fo->step(m->opt, NULL) != FO_OK;
    }
    return failed;
}
