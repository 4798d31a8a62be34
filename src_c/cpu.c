/* Which table of loops runs: what was compiled in, what the processor and the operating system
 * support, and the choice among them. */
#include "kernels.h"
#include "platform.h"
#include <stdatomic.h>
#include <string.h>

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

static atomic_int active;

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

int fo_isa_active(void) { return active; }

bool fo_isa_select(const char *name)
{
    for (int i = 0; i < fo_isa_count(); i++) {
        if (strcmp(fo_isa_name(i), name) == 0 && fo_isa_supported(i)) {
            active = i;
            return true;
        }
    }
    return false;
}

const fo_table *fo_active_table(void) { return tables[active]; }

void fo_select_default_table(void)
{
    for (int i = 0; i < fo_isa_count(); i++)
        if (fo_isa_supported(i))
            active = i;
}

const char *fo_compiler(void) { return FO_COMPILER; }
