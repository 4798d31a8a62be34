/* What holds for the whole process: which table of loops runs (of those that were compiled in and
 * that the processor and the operating system support), whose threads, and how many at most. */
#include "kernels.h"
#include "platform.h"
#include "team.h"
#include <stdatomic.h>
#include <string.h>

/* ---- the instruction set --------------------------------------------------------------------- */

/* Weakest first; the last supported one is active from the start. */
static const fo_table *const tables[] = {
    &fo_table_base,
#ifdef FO_HAVE_AVX2
    &fo_table_avx2,
#endif
#ifdef FO_HAVE_AVX512
    &fo_table_avx512,
#endif
};

static atomic_int active_table;

int fo_isa_count(void) { return (int)(sizeof tables / sizeof tables[0]); }

const char *fo_isa_name(int i) { return tables[i]->name; }

bool fo_isa_supported(int i)
{
    if (strcmp(fo_isa_name(i), "avx2") == 0)
        return FO_CPU_HAS_AVX2();
    if (strcmp(fo_isa_name(i), "avx512") == 0)
        return FO_CPU_HAS_AVX512();
    return true;
}

int fo_isa_active(void) { return active_table; }

bool fo_isa_select(const char *name)
{
    for (int i = 0; i < fo_isa_count(); i++) {
        if (strcmp(fo_isa_name(i), name) == 0 && fo_isa_supported(i)) {
            active_table = i;
            return true;
        }
    }
    return false;
}

const fo_table *fo_active_table(void) { return tables[active_table]; }

void fo_select_default_table(void)
{
    for (int i = 0; i < fo_isa_count(); i++)
        if (fo_isa_supported(i))
            active_table = i;
}

const char *fo_compiler(void) { return FO_COMPILER; }

/* ---- the threading layer --------------------------------------------------------------------- */

static atomic_int active_layer = FO_HAVE_TEAM ? FO_TEAM : FO_SERIAL;

const char *fo_layer_name(fo_layer layer)
{
    static const char *const names[FO_LAYERS] = {"team", "openmp", "serial"};
    return names[layer];
}

bool fo_layer_available(fo_layer layer)
{
#if FO_HAVE_OPENMP
    const bool openmp = fo_share_in_region != NULL;
#else
    const bool openmp = false;
#endif
    const bool available[FO_LAYERS] = {FO_HAVE_TEAM, openmp, true};
    return available[layer];
}

fo_layer fo_layer_active(void)
{
    return (fo_layer)atomic_load_explicit(&active_layer, memory_order_relaxed);
}

bool fo_layer_select(const char *name)
{
    for (int i = 0; i < FO_LAYERS; i++) {
        const bool named = strcmp(fo_layer_name((fo_layer)i), name) == 0;
        if (named & fo_layer_available((fo_layer)i)) {
            active_layer = i;
            return true;
        }
    }
    return false;
}

int fo_openmp_processors(void)
{
#if FO_HAVE_OPENMP
    return fo_region_processors();
#else
    return 0;
#endif
}

static atomic_int num_threads = 1;

int fo_get_num_threads(void) { return atomic_load_explicit(&num_threads, memory_order_relaxed); }

void fo_set_num_threads(int n) { atomic_store_explicit(&num_threads, n, memory_order_relaxed); }

/* ---- the beginning --------------------------------------------------------------------------- */

void fo_init(void)
{
    fo_select_default_table();
    fo_team_init();
#if !FO_HAVE_TEAM
    active_layer = fo_layer_available(FO_OPENMP) ? FO_OPENMP : FO_SERIAL;
#endif
}
