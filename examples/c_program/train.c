/* Linear regression by Adam, in plain C: finds the plane through points that lie on one but for a
 * little noise. The exit status is 0 if it does. */
#include "fastopt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { POINTS = 500, FEATURES = 3, STEPS = 400 };

static const float truth[FEATURES + 1] = {2, -3, 0.5f, 1}; /* slopes and, last, the intercept */

static const fo_api *fo;

static void check(fo_status status)
{
    if (status == FO_OK)
        return;
    fprintf(stderr, "fastopt: %s\n", fo->last_error());
    exit(2);
}

/* The next of a row of numbers between -1 and 1 that look random. */
static float noise(void)
{
    static uint32_t bits = 1;
    bits = bits * 1664525u + 1013904223u;
    return (float)(bits >> 8) / (1 << 23) - 1;
}

/* Writes the gradient of the loss, half the mean squared error; returns the loss. */
static float loss(float x[POINTS][FEATURES], const float *y, const float *slope, float intercept,
                  float *slope_grad, float *intercept_grad)
{
    float sum = 0;
    *intercept_grad = 0;
    for (int j = 0; j < FEATURES; j++)
        slope_grad[j] = 0;
    for (int i = 0; i < POINTS; i++) {
        float error = intercept - y[i];
        for (int j = 0; j < FEATURES; j++)
            error += slope[j] * x[i][j];
        for (int j = 0; j < FEATURES; j++)
            slope_grad[j] += error * x[i][j] / POINTS;
        *intercept_grad += error / POINTS;
        sum += error * error;
    }
    return sum / (2 * POINTS);
}

/* Tells the optimizer where parameter i, its gradient and its state are. */
static void set(fo_optimizer *opt, int64_t i, int64_t size, float *param, float *grad, float *m,
                float *v, int64_t *steps)
{
    const fo_array param_ = fo_dense(FO_F32, param), grad_ = fo_dense(FO_F32, grad);
    const fo_array m_ = fo_dense(FO_F32, m), v_ = fo_dense(FO_F32, v);
    check(fo->set_param(opt, i, 0, size, &param_, steps));
    check(fo->set_state(opt, i, "exp_avg", &m_));
    check(fo->set_state(opt, i, "exp_avg_sq", &v_));
    check(fo->set_grad(opt, i, &grad_));
}

int main(void)
{
    static float x[POINTS][FEATURES], y[POINTS];
    float slope[FEATURES] = {0}, intercept = 0, slope_grad[FEATURES], intercept_grad;
    for (int i = 0; i < POINTS; i++) {
        y[i] = truth[FEATURES] + 0.01f * noise();
        for (int j = 0; j < FEATURES; j++) {
            x[i][j] = noise();
            y[i] += truth[j] * x[i][j];
        }
    }

    /* Adam over two parameters, the slopes and the intercept. Its state starts at zero. */
    float slope_m[FEATURES] = {0}, slope_v[FEATURES] = {0}, intercept_m = 0, intercept_v = 0;
    int64_t slope_steps = 0, intercept_steps = 0;
    fo_optimizer *opt;
    fo = fo_get_api();
    check(fo->create("adam", 1, 2, &opt));
    check(fo->set_hyper(opt, 0, "lr", 0.05));
    set(opt, 0, FEATURES, slope, slope_grad, slope_m, slope_v, &slope_steps);
    set(opt, 1, 1, &intercept, &intercept_grad, &intercept_m, &intercept_v, &intercept_steps);

    for (int step = 0; step < STEPS; step++) {
        const float now = loss(x, y, slope, intercept, slope_grad, &intercept_grad);
        if (step % 100 == 0)
            printf("step %3d, loss %.6f\n", step, now);
        check(fo->step(opt, NULL));
    }
    fo->destroy(opt);

    float worst = fabsf(intercept - truth[FEATURES]);
    for (int j = 0; j < FEATURES; j++)
        worst = fmaxf(worst, fabsf(slope[j] - truth[j]));
    printf("after %d steps the plane is off by %.4f at most\n", (int)slope_steps, worst);
    return worst < 0.01f ? 0 : 1;
}
