/* fastopt for C, C++ and Cython: the optimizers of the Python package, without Python in the loop.
 *
 *     const fo_api *fo = fo_get_api();                     (in an extension module: fo_import())
 *     fo_optimizer *opt;
 *     fo->create("adam", 1, 2, &opt);                      one group, two parameters
 *     fo->set_hyper(opt, 0, "lr", 0.01);
 *     for each parameter i, with zeros in its state and in its counter:
 *         const fo_array p = fo_dense(FO_F32, param), g = fo_dense(FO_F32, grad), ...;
 *         fo->set_param(opt, i, 0, size, &p, &step);
 *         fo->set_state(opt, i, "exp_avg", &m);
 *         fo->set_state(opt, i, "exp_avg_sq", &v);
 *         fo->set_grad(opt, i, &g);
 *     for each batch: write the gradients, then
 *         if (fo->step(opt, NULL) != FO_OK) puts(fo->last_error());
 *     fo->destroy(opt);
 *
 * All functions are members of one table, fo_api. What the rules compute is in the documentation of
 * the Python classes, whose bits these are; docs/c-api.md has the rest: threads, errors, what stays
 * compatible.
 *
 * Every array is the caller's: it is dense, stays where it is while an optimizer has it, and shares
 * no memory with another (a gradient may be exactly its own parameter, but not with zero_grad). It
 * need not be aligned. One optimizer serves one thread at a time; different ones are independent. */
#ifndef FASTOPT_H
#define FASTOPT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* It changes when what was built against another header would break. */
#define FO_ABI 1

/* What a function returns. Unless it is FO_OK, the call has changed nothing. */
typedef int32_t fo_status;
enum {
    FO_OK = 0,
    FO_NO_MEMORY = 1,
    FO_BAD_POINTER = 2, /* one that must not be NULL is */
    FO_BAD_NAME = 3,    /* there is no such rule, hyperparameter or state array */
    FO_BAD_INDEX = 4,   /* there is no such group or parameter */
    FO_BAD_VALUE = 5,   /* a number, or the size of a struct, is out of range */
    FO_INCOMPLETE = 6,  /* the step needs an array that was not set */
    FO_NONFINITE = 7,   /* FO_RAISE, and a gradient holds a NaN or an infinity */
    FO_UNSUPPORTED = 8  /* what this fastopt lacks, or what does not go with the parameter */
};

/* Types of elements. The rules compute in double for an FO_F64 parameter, and else in float: what is
 * stored in fewer bits is decoded, updated and encoded again. What each array may be of:
 *
 *     parameter      FO_F32, FO_F64, FO_BF16, FO_F16
 *     beside FO_F64: all are FO_F64, but the gradient may be of any of these four types
 *     beside the others:
 *     gradient       FO_F32, FO_BF16, FO_F16
 *     average, sum   FO_F32, FO_BF16, FO_F16
 *     state          FO_F32, FO_BF16, FO_F16, and 8 bits: FO_8BIT_UNSIGNED where it is never negative
 *                    (exp_avg_sq, square_avg, sum), or FO_8BIT_SIGNED (exp_avg, momentum_buffer);
 *                    but max_exp_avg_sq, grad_avg, exp_inf and row_sum are FO_F32, and mu_product is
 *                    one double, FO_F64, beside any parameter, which begins at 1 */
typedef int32_t fo_dtype;
enum { FO_F32 = 0, FO_F64 = 1, FO_BF16 = 2, FO_F16 = 3, FO_8BIT_UNSIGNED = 4, FO_8BIT_SIGNED = 5 };

/* How a step stores what lies between two neighbours: as the nearest, or at random as one of the two,
 * so that the mean is right. */
typedef int32_t fo_rounding;
enum { FO_NEAREST = 0, FO_STOCHASTIC = 1 };

typedef int32_t fo_semantics;
enum { FO_TORCH = 0, FO_KERAS = 1 };

typedef int32_t fo_clip;
enum { FO_NO_CLIP = 0, FO_CLIP_VALUE = 1, FO_CLIP_NORM = 2, FO_GLOBAL_CLIP_NORM = 3 };

typedef int32_t fo_nonfinite;
enum { FO_PROPAGATE = 0, FO_SKIP = 1, FO_RAISE = 2 };

/* An array of the caller's. All that is not in use is 0; fo_dense() makes the usual ones.
 *
 * `master` is for a parameter of 16 bits: what its elements lack of a float. It has as many elements,
 * uint16_t (the trailing bits) beside FO_BF16 and float beside FO_F16, and may start as zeros. Then
 * the parameter loses nothing; others may write to it, and steps go on from there. Without a master
 * (NULL), each step rounds the parameter.
 *
 * `rows` is for a gradient that is zero but in some rows, as an embedding table's: stretches of row_size
 * elements, of which `data` has n_rows, in any order; those of one number are added up in the order
 * given. Elements that are in none of them do not take part in the step, and their state stays as it
 * is. A step reads the numbers, and fails with FO_BAD_INDEX if there is no such row.
 *
 * `rounding` is for a parameter of 16 bits without a master, and for state of 16 or 8 bits. `seed` is
 * the parameter's; with the parameter's number i, the number of its step and the number of the
 * element, it determines the random bits. */
typedef struct {
    uint32_t size;  /* sizeof(fo_array) */
    fo_dtype dtype; /* of the elements */
    void *data;     /* as many as the parameter has; of state by row, one for each row */
    void *scales;   /* of 8-bit state: uint8_t, one for every 64 elements and one for the rest */
    void *master;   /* of a parameter of 16 bits, or NULL */
    const int64_t *rows;  /* of a gradient of some rows: which they are, */
    int64_t n_rows;       /* how many, */
    int64_t row_size;     /* and elements of each; 0: the gradient is of all elements. Of state that
                           * has one value for each row (row_sum): elements of a row */
    uint64_t seed;        /* of a parameter, for all its arrays that are rounded at random */
    fo_rounding rounding; /* of a parameter or state, when a step stores it */
    int32_t reserved[3];
} fo_array;

/* An array without anything special. (In a step's loop, make it once.) */
static inline fo_array fo_dense(fo_dtype dtype, void *data)
{
    fo_array array = {sizeof(fo_array), dtype, data, 0, 0, 0, 0, 0, 0, FO_NEAREST, {0, 0, 0}};
    return array;
}

/* Options of all steps to come. A zero is the default of every field:
 *
 *     fo_options options = {0};
 *     options.size = sizeof options; */
typedef struct {
    uint32_t size;          /* sizeof(fo_options) */
    fo_semantics semantics; /* whose formulas */
    fo_clip clip;           /* each element; each gradient's norm; all gradients' norm */
    fo_nonfinite nonfinite; /* what a NaN or an infinity in a gradient does */
    double clip_limit;      /* above 0, where there is a clip */
    double loss_scale;      /* above 0: the gradients are divided by it; 0: it is 1 */
    double ema_decay;       /* 0 to 1, of the averages that set_average has bound */
    int32_t ema_starts;     /* not 0: the averages become copies of the parameters */
    int32_t zero_grad;      /* not 0: gradients are zeroed afterwards */
    int32_t num_threads;    /* at most; 0: as many as set_num_threads says */
    int32_t accumulate; /* steps whose mean gradient makes an update, with set_sum; 0: each does */
} fo_options;

/* What a step did. The caller sets `size` to sizeof(fo_result). */
typedef struct {
    uint32_t size;
    int32_t threads;     /* that took part */
    int32_t has_norm;    /* whether the step needed the norm */
    int32_t skipped;     /* whether nothing was updated, because of FO_SKIP or FO_RAISE */
    int32_t accumulated; /* steps that the sums are of by now; 0 after an update */
    int32_t reserved;
    int64_t nonfinite_param; /* then the first parameter with such a gradient; or -1 */
    double grad_norm;        /* of all unscaled gradients, before clipping */
} fo_result;

typedef struct fo_optimizer fo_optimizer;

typedef struct {
    uint32_t abi;  /* FO_ABI of the library */
    uint32_t size; /* of its table: later versions of one ABI append to it */

    /* In words, what was wrong with this thread's last call that failed. It holds until the next. */
    const char *(*last_error)(void);

    /* Names, j = 0, 1, ...; NULL after the last one, and for a rule that does not exist. */
    const char *(*rule_name)(int32_t j);
    const char *(*hyper_name)(const char *rule, int32_t j);
    const char *(*state_name)(const char *rule, int32_t j);

    /* An optimizer over parameters 0 to n_params - 1, each of one of the groups 0 to n_groups - 1.
     * Hyperparameters have the defaults of the Python class. */
    fo_status (*create)(const char *rule, int32_t n_groups, int64_t n_params, fo_optimizer **opt);
    void (*destroy)(fo_optimizer *opt); /* NULL is nothing to destroy */

    /* A group's hyperparameters; flags are 0 or 1. The ranges are those of the class. */
    fo_status (*set_hyper)(fo_optimizer *opt, int32_t group, const char *name, double value);
    fo_status (*get_hyper)(const fo_optimizer *opt, int32_t group, const char *name, double *value);

    /* Whether a step of this group, with its hyperparameters as they are, touches a state array. */
    fo_status (*uses_state)(const fo_optimizer *opt, int32_t group, const char *name,
                            int32_t *uses);

    fo_status (*set_options)(fo_optimizer *opt, const fo_options *options); /* NULL: the defaults */

    /* Parameter i: `size` elements, and the number of its steps so far, which a step advances. It
     * forgets the parameter's other arrays, and what was said of how they are stored. */
    fo_status (*set_param)(fo_optimizer *opt, int64_t i, int32_t group, int64_t size,
                           const fo_array *param, int64_t *step);

    /* Its state, its average, the sum of its gradients for `accumulate` (and whether that holds any
     * yet, 0 or 1) and its gradient. NULL takes one away. A parameter without a gradient is left out
     * of the step. */
    fo_status (*set_state)(fo_optimizer *opt, int64_t i, const char *name, const fo_array *state);
    fo_status (*set_average)(fo_optimizer *opt, int64_t i, const fo_array *average);
    fo_status (*set_sum)(fo_optimizer *opt, int64_t i, const fo_array *sum, int32_t holds);
    fo_status (*set_grad)(fo_optimizer *opt, int64_t i, const fo_array *grad);

    /* For a run that is resumed between two updates: how many steps the sums are of. */
    fo_status (*set_accumulated)(fo_optimizer *opt, int32_t steps);

    /* Updates everything or, if it fails or skips, nothing. `result` may be NULL. It takes no memory
     * from the heap but in the first step after set_param, and where gradients are of some rows, for
     * more of these than before. */
    fo_status (*step)(fo_optimizer *opt, fo_result *result);

    /* The most threads that a step of the process may use: 1 in a program, until it says otherwise;
     * in Python, fastopt.set_num_threads() and this are the same. */
    fo_status (*set_num_threads)(int32_t n);
    int32_t (*get_num_threads)(void);

    /* Whose threads run the steps of the process: "team", the library's own, from the start;
     * "openmp", one parallel region of a fixed number of threads a step; "serial". The bits are the
     * same. In Python, fastopt.set_threading_layer() and this are the same. */
    fo_status (*set_threading_layer)(const char *name);
    const char *(*get_threading_layer)(void);

    /* Whether a state array of parameter i holds anything yet. sgd's "momentum_buffer" does so from
     * its first use on, where FO_TORCH starts it as a copy of the gradient. Steps keep track of it
     * from the first one on. A run that is resumed, with a counter above 0 in set_param, takes the
     * array for one that has begun, unless it is told otherwise: save this beside the counter. */
    fo_status (*set_begun)(fo_optimizer *opt, int64_t i, const char *name, int32_t begun);
    fo_status (*get_begun)(const fo_optimizer *opt, int64_t i, const char *name, int32_t *begun);
} fo_api;

/* For a program that contains the library. Its first call comes before the program has threads. */
const fo_api *fo_get_api(void);

#ifdef Py_PYTHON_H /* Python.h was included before */

/* For an extension module: the table of the fastopt that is installed, or NULL with an ImportError.
 * It needs the GIL; the functions in the table do not. */
static inline const fo_api *fo_import(void)
{
    const fo_api *api = (const fo_api *)PyCapsule_Import("fastopt._core._C_API", 0);
    if (!api) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError))
            PyErr_SetString(PyExc_ImportError,
                            "the installed fastopt has no C interface; upgrade fastopt");
        return NULL;
    }
    if (api->abi != FO_ABI) {
        PyErr_Format(PyExc_ImportError,
                     "this module was built for version %d of fastopt's C interface, and the "
                     "installed fastopt has version %d; build the module again",
                     (int)FO_ABI, (int)api->abi);
        return NULL;
    }
    if (api->size < sizeof(fo_api)) {
        PyErr_SetString(PyExc_ImportError, "this module was built against a newer fastopt than the "
                                           "one that is installed; upgrade fastopt");
        return NULL;
    }
    return api;
}

#endif

#ifdef __cplusplus
}
#endif

#endif
